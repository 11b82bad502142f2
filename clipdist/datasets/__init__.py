"""Making, inspecting and labelling data sets."""
