"""Follow a run from another terminal, or another machine that sees its folder."""
