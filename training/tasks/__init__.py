"""Tasks, one file each; `base` describes what a task has to give."""

from .base import Batch, Layout, Task, TaskOutput, get_task, task_names

__all__ = ["Batch", "Layout", "Task", "TaskOutput", "get_task", "task_names"]
