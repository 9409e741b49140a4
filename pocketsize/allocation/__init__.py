"""Who gets how many bits, or how many channels, under one budget."""
