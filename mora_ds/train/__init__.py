"""The main job: from settings to a trained and exported model."""
