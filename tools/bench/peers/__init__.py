"""Other trainers, as they are, for clipdist to be measured against. No training of clipdist's depends on them."""
