"""From image and question to an answer: one at a time, in a conversation, or many together."""
