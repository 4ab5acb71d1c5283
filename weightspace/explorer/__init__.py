"""What the pages in ``app/`` show: jobs outside their thread, tables, figures and uploads, without the pages.

``launch`` starts the server, ``ui`` is the only module that speaks to Streamlit; everything else is plain functions.
"""
