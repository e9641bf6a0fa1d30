from django.core import mail
from django.db import connection
from django.test import TestCase

from .models import Mail, User
from .tasks import send_welcome

ADA = {"name": "Ada", "email": "ada@example.org"}


def tasks() -> list[tuple[str, str]]:
    with connection.cursor() as cursor:
        cursor.execute("SELECT type, data ->> 'user_id' FROM apoq_tasks")
        return cursor.fetchall()


class SignUp(TestCase):
    def test_it_adds_a_task(self):
        self.client.post("/sign-up", ADA)

        self.assertEqual(tasks(), [(send_welcome.type, str(User.objects.get().pk))])

    def test_an_exception_rolls_the_task_back(self):
        with self.assertRaises(RuntimeError):
            self.client.post("/sign-up", {**ADA, "fail": "1"})

        self.assertEqual(tasks(), [])


class SendWelcome(TestCase):
    def test_it_sends_a_mail(self):
        user = User.objects.create(**ADA)

        send_welcome(user_id=user.pk)

        self.assertEqual([message.subject for message in mail.outbox], ["Welcome, Ada"])
        self.assertEqual(Mail.objects.get().user, user)
