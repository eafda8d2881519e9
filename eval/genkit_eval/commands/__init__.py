"""Bodies of the commands; ``cli`` reads their options."""
