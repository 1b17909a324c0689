"""Reports for people: tables, plots, pages."""
