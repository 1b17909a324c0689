"""The refinement: learn what codes leave free, end to end, by back-propagation. Off by default."""
