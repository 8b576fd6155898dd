"""The servers that Duet is measured beside, and what it takes to run and to load them."""
