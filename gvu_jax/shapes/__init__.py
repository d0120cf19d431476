"""The shapes world: pictures of coloured shapes on a grid, prompts about them, and an exact checker."""
