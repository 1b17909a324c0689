"""The refinement: learn what codes leave free, end to end. Off by default."""
