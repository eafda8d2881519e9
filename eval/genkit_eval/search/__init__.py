"""Many guidances from one template: a grid of named values (sweep), or values looked for under a budget (tune)."""
