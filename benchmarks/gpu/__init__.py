"""What a GPU machine says of the project: every path run once and measured, by one command."""
