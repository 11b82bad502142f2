"""Other trainers, as they are: what clipdist measures itself against. Nothing of clipdist's own training is in here."""
