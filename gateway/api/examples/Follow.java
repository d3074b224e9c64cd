import com.google.gson.JsonObject;
import com.google.gson.JsonParser;
import java.io.BufferedReader;
import java.io.IOException;
import java.io.InputStream;
import java.io.InputStreamReader;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.net.http.HttpResponse.BodyHandlers;
import java.nio.charset.StandardCharsets;
import java.time.Duration;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.concurrent.Executors;
import java.util.concurrent.ScheduledExecutorService;
import java.util.concurrent.ScheduledFuture;
import java.util.concurrent.ThreadLocalRandom;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.TimeoutException;
import java.util.function.BiConsumer;
import java.util.stream.Collectors;

/** Follows tasks on the event stream of the gateway, across reconnects. */
public final class Follow implements AutoCloseable {
    private final HttpClient client = HttpClient.newBuilder().connectTimeout(Duration.ofSeconds(10)).build();
    private final ScheduledExecutorService watchdog = Executors.newSingleThreadScheduledExecutor();
    private final URI gateway;
    private final Duration silence;
    private String lastId = "";
    private long retryMillis = 2000;
    private int failures;

    /** A connection without data for 45 seconds, three heartbeats of the gateway, counts as lost. */
    public Follow(URI gateway) {
        this(gateway, Duration.ofSeconds(45));
    }

    public Follow(URI gateway, Duration silence) {
        this.gateway = gateway;
        this.silence = silence;
    }

    /** Call listener with "progress" or "problem" and its data, until all tasks have ended. */
    public void follow(List<String> taskIds, Duration within, BiConsumer<String, JsonObject> listener)
            throws InterruptedException, Progress.Refused, TimeoutException {
        long deadline = System.nanoTime() + within.toNanos();
        String query = taskIds.stream().map(id -> "taskId=" + id).collect(Collectors.joining("&"));
        while (System.nanoTime() < deadline) {
            double retryAfter = 0;
            HttpRequest.Builder request = HttpRequest.newBuilder(gateway.resolve("v1/events?" + query))
                    .header("Accept", "text/event-stream")
                    .timeout(silence);
            if (!lastId.isEmpty()) {
                request.header("Last-Event-ID", lastId);
            }
            try {
                HttpResponse<InputStream> response = client.send(request.build(), BodyHandlers.ofInputStream());
                try (InputStream body = response.body()) {
                    if (response.statusCode() == 200) {
                        if (read(body, deadline, listener)) {
                            return;
                        }
                    } else if (response.statusCode() < 500 && response.statusCode() != 429) {
                        throw new Progress.Refused(new String(body.readAllBytes(), StandardCharsets.UTF_8));
                    } else {
                        retryAfter = 1000 * Progress.retryAfter(response);
                    }
                }
            } catch (IOException e) {
                // The gateway restarted, or the network failed.
            }
            double jitter = ThreadLocalRandom.current().nextDouble(0.5, 1);
            double pause = Math.max(Math.min(retryMillis * Math.pow(2, failures++), 30_000) * jitter, retryAfter);
            double millisLeft = (deadline - System.nanoTime()) / 1e6;
            Thread.sleep((long) Math.ceil(Math.max(0, Math.min(pause, millisLeft))));
        }
        throw new TimeoutException(String.join(", ", taskIds) + ": did not end within " + within.toSeconds() + " s");
    }

    /** Return whether the stream sent `end`. The watchdog ends a blocked read by closing the body. */
    private boolean read(InputStream body, long deadline, BiConsumer<String, JsonObject> listener) throws IOException {
        BufferedReader lines = new BufferedReader(new InputStreamReader(body, StandardCharsets.UTF_8));
        Map<String, String> fields = new HashMap<>();
        ScheduledFuture<?> closing = closeAfterSilence(body, deadline);
        try {
            for (String line; (line = lines.readLine()) != null; ) {
                closing.cancel(false);
                closing = closeAfterSilence(body, deadline);
                if (!line.isEmpty()) {
                    int colon = line.indexOf(": ");
                    fields.put(line.substring(0, Math.max(colon, 0)), line.substring(colon + 2));
                    continue;
                }
                failures = 0;
                lastId = fields.getOrDefault("id", lastId);
                retryMillis = Long.parseLong(fields.getOrDefault("retry", Long.toString(retryMillis)));
                String event = fields.getOrDefault("event", "");
                if (event.equals("end")) {
                    return true;
                }
                if (!event.isEmpty()) {
                    listener.accept(event, JsonParser.parseString(fields.get("data")).getAsJsonObject());
                }
                fields.clear();
            }
            return false;
        } finally {
            closing.cancel(false);
        }
    }

    private ScheduledFuture<?> closeAfterSilence(InputStream body, long deadline) {
        long nanos = Math.min(silence.toNanos(), deadline - System.nanoTime());
        return watchdog.schedule(
                () -> {
                    body.close();
                    return null;
                },
                nanos,
                TimeUnit.NANOSECONDS);
    }

    @Override
    public void close() {
        watchdog.shutdownNow();
    }
}
