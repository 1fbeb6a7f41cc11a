# mongorekey in a small image, with what the demo of docker-compose.yml needs beside it.

FROM rust:1.95-slim-bookworm AS build
WORKDIR /build
COPY . .
# The caches outlive the layer, so that a changed line does not compile every dependency again.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/build/target \
    cargo build --release --locked --bins --examples \
    && install -D -t /out target/release/mongorekey target/release/examples/seed

FROM debian:bookworm-slim
COPY --from=build /out/ /usr/local/bin/
COPY scripts/demo-steps /usr/local/bin/
COPY fixtures/mongorekey.toml /home/mongorekey/
RUN useradd --system --home-dir /home/mongorekey --shell /usr/sbin/nologin mongorekey
USER mongorekey
WORKDIR /home/mongorekey
ENTRYPOINT ["mongorekey"]
CMD ["--help"]
