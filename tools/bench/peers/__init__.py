"""Other trainers and evaluations, as they are, beside clipdist's. No training of clipdist's depends on them."""
