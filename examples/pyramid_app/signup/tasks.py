import smtplib
from email.message import EmailMessage

from apoq.pyramid import apoq_task
from signup.models import Mail, User


@apoq_task("send_welcome", retry_limit=10)
def send_welcome(task, request):
    user = request.dbsession.get_one(User, task.data["user_id"])
    message = EmailMessage()
    message["From"], message["To"] = "hello@example.org", user.email
    message["Subject"] = f"Welcome, {user.name}"
    message.set_content(f"It's good to have you here: {request.route_url('home')}")
    settings = request.registry.settings
    with smtplib.SMTP(settings["smtp.host"], int(settings["smtp.port"])) as smtp:
        smtp.send_message(message)
    request.dbsession.add(Mail(user=user))  # commits together with the task's completion
