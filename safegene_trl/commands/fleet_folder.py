"""What a fleet's folder holds beside its checkpoints."""

STATE, WORKSHOP = "fleet.json", "fleet"
