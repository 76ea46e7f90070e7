"""What training reaches: the plans behind docs/findings.md, the healing of a real model, and what teachers and weights do."""
