"""Draw one page of figures of one or several runs."""
