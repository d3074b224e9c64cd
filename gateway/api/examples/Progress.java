import com.google.gson.JsonElement;
import com.google.gson.JsonObject;
import com.google.gson.JsonParseException;
import com.google.gson.JsonParser;
import java.io.IOException;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.net.http.HttpResponse.BodyHandlers;
import java.time.Duration;
import java.util.ArrayList;
import java.util.List;
import java.util.concurrent.ThreadLocalRandom;
import java.util.concurrent.TimeoutException;
import java.util.regex.Matcher;
import java.util.regex.Pattern;

/** Waits for tasks through the gateway. */
public final class Progress {
    /** The request failed, and a retry would fail in the same way. */
    public static final class Refused extends Exception {
        Refused(String message) {
            super(message);
        }
    }

    private static final Pattern MAX_AGE = Pattern.compile("max-age=(\\d{1,9})");

    private final HttpClient client = HttpClient.newBuilder().connectTimeout(Duration.ofSeconds(10)).build();
    private final URI gateway;
    private final Duration unknown;

    /** A new task is unknown to the vendor for a moment: it may be rejected for 30 seconds. */
    public Progress(URI gateway) {
        this(gateway, Duration.ofSeconds(30));
    }

    public Progress(URI gateway, Duration unknown) {
        this.gateway = gateway;
        this.unknown = unknown;
    }

    /**
     * Return the final progress of a task.
     *
     * @param within bounds the whole wait
     * @param waitSeconds length of a long poll; 0 polls instead
     */
    public JsonObject finished(String taskId, Duration within, int waitSeconds)
            throws InterruptedException, Refused, TimeoutException {
        long deadline = System.nanoTime() + within.toNanos();
        long knownBy = System.nanoTime() + unknown.toNanos();
        String etag = "";
        String lastError = "still running";
        int failures = 0;
        for (long left; (left = deadline - System.nanoTime()) > 0; ) {
            HttpResponse<String> response = null;
            try {
                response = client.send(request(taskId, etag, Math.min(waitSeconds, left / 1e9), waitSeconds),
                        BodyHandlers.ofString());
            } catch (IOException e) {
                lastError = e.toString();
            }
            double pause;
            if (response != null && (response.statusCode() == 200 || response.statusCode() == 304)) {
                if (response.statusCode() == 200) {
                    JsonObject progress = JsonParser.parseString(response.body()).getAsJsonObject();
                    if (progress.get("terminal").getAsBoolean()) {
                        return progress;
                    }
                    etag = response.headers().firstValue("etag").orElseThrow();
                }
                failures = 0;
                lastError = "still running";
                knownBy = System.nanoTime() + unknown.toNanos();
                pause = waitSeconds > 0 ? 0.5 : lifetime(response);
            } else {
                failures++;
                pause = Math.min(Math.pow(2, failures), 30) * ThreadLocalRandom.current().nextDouble(0.5, 1);
                double rest = (knownBy - System.nanoTime()) / 1e9; // afterwards a rejection is final
                pause = rest > 0 ? Math.min(pause, rest) : pause;
                if (response != null) {
                    lastError = problem(response, System.nanoTime() < knownBy);
                    pause = Math.max(pause, retryAfter(response));
                }
            }
            double millisLeft = (deadline - System.nanoTime()) / 1e6;
            Thread.sleep((long) Math.ceil(Math.max(0, Math.min(pause * 1e3, millisLeft))));
        }
        throw new TimeoutException(taskId + " did not end within " + within.toSeconds() + " s: " + lastError);
    }

    /** Return the URLs of the images of a task that has succeeded. They expire: download the images soon. */
    public List<String> imageUrls(String taskId) throws IOException, InterruptedException {
        HttpRequest request = HttpRequest.newBuilder(gateway.resolve("v1/results/" + taskId))
                .timeout(Duration.ofSeconds(30)).build();
        HttpResponse<String> response = client.send(request, BodyHandlers.ofString());
        if (response.statusCode() != 200) {
            throw new IOException("HTTP status " + response.statusCode());
        }
        List<String> urls = new ArrayList<>();
        for (JsonElement image : JsonParser.parseString(response.body()).getAsJsonObject().getAsJsonArray("images")) {
            urls.add(image.getAsJsonObject().get("url").getAsString());
        }
        return urls;
    }

    private HttpRequest request(String taskId, String etag, double wait, int timeout) {
        String path = "v1/progress/" + taskId;
        if (!etag.isEmpty()) {
            path += "?wait=" + (long) wait;
        }
        HttpRequest.Builder request = HttpRequest.newBuilder(gateway.resolve(path));
        if (!etag.isEmpty()) {
            request.header("If-None-Match", etag);
        }
        return request.timeout(Duration.ofSeconds(timeout + 15L)).build();
    }

    /** Return the lifetime of a response in seconds, at least 1. */
    private static double lifetime(HttpResponse<?> response) {
        Matcher maxAge = MAX_AGE.matcher(response.headers().firstValue("cache-control").orElse(""));
        return maxAge.find() ? Math.max(1, Double.parseDouble(maxAge.group(1))) : 1;
    }

    /** Return the error message. Throws Refused if a retry would not help. */
    static String problem(HttpResponse<String> response, boolean mayBeNew) throws Refused {
        int status = response.statusCode();
        String code = "";
        String message = "HTTP status " + status;
        try {
            JsonObject body = JsonParser.parseString(response.body()).getAsJsonObject();
            code = body.get("code").getAsString();
            String detail = body.get("detail").getAsString();
            if (body.has("upstream") && !body.getAsJsonObject("upstream").get("errMessage").isJsonNull()) {
                detail += ": " + body.getAsJsonObject("upstream").get("errMessage").getAsString(); // the vendor's reason
            }
            message = code + ": " + detail + " (" + body.get("requestId").getAsString() + ")";
        } catch (JsonParseException | IllegalStateException | NullPointerException | ClassCastException e) {
            // The response is from a proxy, not from the gateway.
        }
        if (code.equals("upstream-rejected") ? !mayBeNew : status < 500 && status != 429) {
            throw new Refused(message);
        }
        return message;
    }

    /** Return the seconds of Retry-After; 0 if it is missing or a date. */
    static double retryAfter(HttpResponse<?> response) {
        String text = response.headers().firstValue("retry-after").orElse("");
        return text.matches("\\d{1,9}") ? Double.parseDouble(text) : 0;
    }
}
