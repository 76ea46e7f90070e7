"""One rollout batch turned into optimizer steps."""
