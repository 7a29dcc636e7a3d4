"""The main job on real weights: two NVFP4 checkpoints, one model, reloaded A → B → A while every promise is checked."""
