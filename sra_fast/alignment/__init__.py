"""The alignment loss: where the target features come from, its weight over time, the objective."""
