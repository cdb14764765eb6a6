"""The growth experiment in the regime of the published models: see docs/growth_experiment.md."""
