"""States, commands, escrow rules and receivers of an invitation, without any I/O."""
