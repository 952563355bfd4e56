"""One pure function per figure."""
