"""Trainings, data sets and options of other tools (kohya, OneTrainer, ai-toolkit, SimpleTuner, diffusers) as ours."""
