"""The LoRA data set: one DreamBooth LoRA per person, many people, and its collection."""
