"""Say what this machine has, what is missing and what to choose."""
