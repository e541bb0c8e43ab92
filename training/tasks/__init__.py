"""Tasks, one file each; `base` describes what a task has to give."""

from .base import Batch, DataOptions, Layout, Task, TaskOutput, get_task, task_names

__all__ = ["Batch", "DataOptions", "Layout", "Task", "TaskOutput", "get_task", "task_names"]
