"""What one method alone needs: sliders, preferences, LCM distillation, whole models."""
