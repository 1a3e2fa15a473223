"""Follow a run from another terminal."""
