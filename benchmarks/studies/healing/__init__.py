"""Two real language models, damaged and healed: six kinds of supervision, by a plan that was written before the runs.

``plan.yaml`` says what is trained, ``problems`` makes the prompts, ``runner`` trains what is not finished, ``measures`` compares
a student with its teacher, ``report`` writes docs/healing/models.md, ``pieces`` carries the weights to where no network is.
"""
