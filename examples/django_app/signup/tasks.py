from django.core.mail import send_mail

from apoq import Queue

from .models import Mail, User

queue = Queue()


@queue.task
def send_welcome(user_id: int) -> None:
    user = User.objects.get(pk=user_id)
    send_mail(f"Welcome, {user.name}", "It's good to have you here.", "hello@example.org", [user.email])
    Mail.objects.get_or_create(
        user=user
    )  # not `create`, because the task may run again if its worker dies now
