"""docs/leaderboard.md and .html: variants by conditions with intervals and uncertain ranks, from committed records alone."""
