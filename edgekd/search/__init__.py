"""Several students of one recipe: what may be changed (`space`), who proposes it (`trials`), and the run (`run`)."""
