"""What keeps a file from running, here or on a server."""
