"""An OpenAI-compatible endpoint: a trained model behind HTTP, with the store of encoded videos in front of it."""
