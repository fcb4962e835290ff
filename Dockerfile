# A bundle behind HTTP, on the CPU:  docker compose up  (see docker-compose.yml).
FROM python:3.11-slim

WORKDIR /app
COPY settings.ini setup.py README.md LICENSE ./
COPY docker docker
COPY nbs nbs
COPY hatemm_clip hatemm_clip
RUN sh docker/image.sh install /opt/hatemm

# Nobody in particular: nothing but /jobs and /tmp is ever written.
RUN install -d -o 10001 -g 10001 /jobs
USER 10001:10001
ENV HOME=/tmp PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1
EXPOSE 5000
HEALTHCHECK --interval=30s --timeout=6s --start-period=120s CMD ["/opt/hatemm/bin/python", "/app/docker/health.py", "readyz"]
ENTRYPOINT ["/opt/hatemm/bin/hatemm"]
CMD ["serve", "/bundle", "--host", "0.0.0.0", "--jobs-dir", "/jobs"]
