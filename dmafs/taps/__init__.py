"""The taps: what captures the writes of a primary."""
