# The project on the official Airflow image: `docker compose build`.
# The slim one, which has Airflow and no providers: the others come from requirements*.txt in the versions that the tests ran with.
ARG AIRFLOW_VERSION=3.3.2
FROM apache/airflow:slim-${AIRFLOW_VERSION}-python3.12
ARG AIRFLOW_VERSION

# include/ is found in the first folder, plugins/payroc_airflow in the second.
ENV PYTHONPATH=/opt/airflow:/opt/airflow/plugins

COPY requirements.txt requirements-image.txt constraints.txt /opt/airflow/
# Airflow's version is named again, so that nothing here can change it.
RUN pip install --no-cache-dir "apache-airflow==${AIRFLOW_VERSION}" -r requirements.txt -r requirements-image.txt -c constraints.txt

COPY --chown=airflow:0 pyproject.toml /opt/airflow/
COPY --chown=airflow:0 include /opt/airflow/include
COPY --chown=airflow:0 plugins /opt/airflow/plugins
COPY --chown=airflow:0 dags /opt/airflow/dags
COPY --chown=airflow:0 docker /opt/airflow/docker
COPY --chown=airflow:0 demo/sample_refunds.csv /opt/airflow/demo/sample_refunds.csv

# Without installed entry points Airflow does not know the connection type payroc, the commands can't reach Payroc, and each task imports
# anew what scheduler and workers could have imported for all.
# Compiled here once: a process that may not write beside the sources would compile its imports again.
# A volume takes over owner and rights of the folder that it is mounted on, so the folders have to be there.
RUN pip install --no-cache-dir --no-deps --editable . \
    && python -m compileall -q include plugins dags \
    && mkdir -p logs summaries sandbox
