"""What a command does, as a function. Only this package and `cli` import all three packages."""
