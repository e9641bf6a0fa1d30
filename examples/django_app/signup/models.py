from django.db import models


class User(models.Model):
    name = models.TextField()
    email = models.EmailField()


class Mail(models.Model):
    user = models.OneToOneField(User, on_delete=models.CASCADE)
