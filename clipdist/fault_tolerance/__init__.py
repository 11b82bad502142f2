"""What keeps a run alive, or ends it well: signals, a watch over ranks, agreement, the guard of the numbers."""
