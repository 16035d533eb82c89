"""What a user sees: chat, the numbers of a run, flags and errors, progress."""
