"""The messagebus backend of pubsub_core."""
