import com.google.gson.JsonElement;
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
import java.net.http.HttpTimeoutException;
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

/** Follows tasks on the event stream of the gateway, across reconnects, or by long polls. */
public final class Follow {
    private static final System.Logger LOG = System.getLogger(Follow.class.getName());
    private static final Duration UNKNOWN = Duration.ofSeconds(30);
    // One thread for all streams. It is a daemon, so it does not keep the program alive.
    private static final ScheduledExecutorService WATCHDOG = Executors.newSingleThreadScheduledExecutor(task -> {
        Thread thread = new Thread(task, "progress-watchdog");
        thread.setDaemon(true);
        return thread;
    });

    private final HttpClient client = HttpClient.newBuilder().connectTimeout(Duration.ofSeconds(10)).build();
    private final URI gateway;
    private final Duration silence;
    private final Duration opening;
    private String lastId = "";
    private long retryMillis = 2000;
    private int failures;

    /**
     * A connection without data for 45 seconds, three heartbeats of the gateway, counts as lost. A stream begins at
     * once. If it does not begin within 5 seconds, but the gateway responds, long polls replace it.
     */
    public Follow(URI gateway) {
        this(gateway, Duration.ofSeconds(45), Duration.ofSeconds(5));
    }

    public Follow(URI gateway, Duration silence, Duration opening) {
        this.gateway = gateway;
        this.silence = silence;
        this.opening = opening.compareTo(silence) < 0 ? opening : silence;
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
                    .timeout(opening);
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
            } catch (HttpTimeoutException e) {
                if (responds(query)) {
                    LOG.log(
                            System.Logger.Level.WARNING,
                            "the event stream did not begin: a proxy buffers it; using long polls instead");
                    poll(query, deadline, listener);
                    return;
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

    private boolean responds(String query) throws InterruptedException {
        try {
            return ask(query, "", 0).statusCode() == 200;
        } catch (IOException e) {
            return false;
        }
    }

    private HttpResponse<String> ask(String query, String etag, double wait) throws IOException, InterruptedException {
        String target = "v1/progress?" + query;
        if (!etag.isEmpty()) {
            target += "&wait=" + (long) wait;
        }
        HttpRequest.Builder request = HttpRequest.newBuilder(gateway.resolve(target)).timeout(Duration.ofSeconds(40));
        if (!etag.isEmpty()) {
            request.header("If-None-Match", etag);
        }
        return client.send(request.build(), BodyHandlers.ofString());
    }

    /** Call listener as `follow` does, by long polls. A task that is rejected for 30 seconds has ended. */
    private void poll(String query, long deadline, BiConsumer<String, JsonObject> listener)
            throws InterruptedException, Progress.Refused, TimeoutException {
        String etag = "";
        int failed = 0;
        Map<String, JsonObject> shown = new HashMap<>();
        Map<String, Long> rejected = new HashMap<>();
        for (long left; (left = deadline - System.nanoTime()) > 0; ) {
            HttpResponse<String> response = null;
            try {
                double rest = rejected.values().stream()
                        .mapToDouble(since -> (since + UNKNOWN.toNanos() - System.nanoTime()) / 1e9)
                        .filter(seconds -> seconds > 0)
                        .min()
                        .orElse(25);
                response = ask(query, etag, Math.min(Math.min(25, rest), left / 1e9));
            } catch (IOException e) {
                // The gateway restarted, or the network failed.
            }
            int status = response == null ? 0 : response.statusCode();
            if (status == 200) {
                etag = response.headers().firstValue("etag").orElseThrow();
                for (JsonElement each : JsonParser.parseString(response.body()).getAsJsonObject().getAsJsonArray("items")) {
                    JsonObject item = each.getAsJsonObject();
                    String taskId = item.get("taskId").getAsString();
                    item.remove("ageSeconds"); // the events of a stream do not have them, either
                    item.remove("stale");
                    JsonObject error = item.getAsJsonObject("error");
                    if (error != null) {
                        error.addProperty("taskId", taskId);
                    }
                    JsonObject content = (error == null ? item : error).deepCopy();
                    content.remove("requestId"); // the IDs in a problem differ from request to request
                    content.remove("upstream");
                    if (!content.equals(shown.put(taskId, content))) {
                        listener.accept(error == null ? "progress" : "problem", error == null ? item : error);
                    }
                    if (error == null || !error.get("code").getAsString().equals("upstream-rejected")) {
                        rejected.remove(taskId);
                    } else {
                        rejected.putIfAbsent(taskId, System.nanoTime());
                    }
                }
            } else if (status != 0 && status < 500 && status != 304 && status != 429) {
                throw new Progress.Refused(response.body());
            }
            boolean ended = shown.entrySet().stream().allMatch(task -> hasEnded(task.getValue(), rejected.get(task.getKey())));
            if (ended && !shown.isEmpty()) {
                return;
            }
            failed = status == 200 || status == 304 ? 0 : failed + 1;
            double jitter = ThreadLocalRandom.current().nextDouble(0.5, 1);
            double pause = failed == 0 ? 500 : Math.min(1000 * Math.pow(2, failed), 30_000) * jitter;
            if (failed > 0 && response != null) {
                pause = Math.max(pause, 1000 * Progress.retryAfter(response));
            }
            double millisLeft = (deadline - System.nanoTime()) / 1e6;
            Thread.sleep((long) Math.ceil(Math.max(0, Math.min(pause, millisLeft))));
        }
        throw new TimeoutException("the tasks did not end in time");
    }

    private static boolean hasEnded(JsonObject content, Long rejectedSince) {
        boolean terminal = content.has("terminal") && content.get("terminal").getAsBoolean();
        return terminal || (rejectedSince != null && System.nanoTime() - rejectedSince >= UNKNOWN.toNanos());
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
        return WATCHDOG.schedule(
                () -> {
                    body.close();
                    return null;
                },
                nanos,
                TimeUnit.NANOSECONDS);
    }
}
