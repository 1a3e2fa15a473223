"""The command `bce3s fast-train`: from options to a `Launch`."""
