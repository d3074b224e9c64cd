{{- define "gateway.fullname" -}}
{{- if .Values.fullnameOverride }}{{ .Values.fullnameOverride | trunc 63 | trimSuffix "-" }}
{{- else }}{{- $name := default .Chart.Name .Values.nameOverride }}
{{- if contains $name .Release.Name }}{{ .Release.Name | trunc 63 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name $name | trunc 63 | trimSuffix "-" }}{{ end }}{{ end }}
{{- end }}

{{/* Labels that select the pods. The selector of a Deployment is immutable, so these labels must never change. */}}
{{- define "gateway.selector" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: gateway
{{- end }}

{{- define "gateway.labels" -}}
{{ include "gateway.labelsWith" (list . dict) }}
{{- end }}

{{/* All labels of an object, from a list of the context and the object's own labels. The labels of the chart take
     precedence over the object's own, and those over commonLabels. */}}
{{- define "gateway.labelsWith" -}}
{{- $root := index . 0 }}
{{- $chart := merge (include "gateway.selector" $root | fromYaml) (include "gateway.releaseLabels" $root | fromYaml) }}
{{- merge $chart (index . 1) $root.Values.commonLabels | toYaml }}
{{- end }}

{{- define "gateway.releaseLabels" -}}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "gateway.image" -}}
{{ .Values.image.repository }}
{{- if .Values.image.digest }}@{{ .Values.image.digest }}{{ else }}:{{ default .Chart.AppVersion .Values.image.tag }}{{ end }}
{{- end }}

{{- define "gateway.ipFamilies" -}}
{{- with .Values.service.ipFamilyPolicy }}ipFamilyPolicy: {{ . }}{{ end }}
{{- with .Values.service.ipFamilies }}
ipFamilies: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "gateway.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}{{ default (include "gateway.fullname" .) .Values.serviceAccount.name }}
{{- else }}{{ default "default" .Values.serviceAccount.name }}{{ end }}
{{- end }}

{{- define "gateway.credentialsSecret" -}}
{{- $given := or .Values.credentials.accessKey .Values.credentials.secretKey }}
{{- if and .Values.credentials.existingSecret $given }}
{{- fail "credentials: set either existingSecret or accessKey and secretKey, not both" }}
{{- else if .Values.credentials.existingSecret }}{{ .Values.credentials.existingSecret }}
{{- else if and .Values.credentials.accessKey .Values.credentials.secretKey }}{{ include "gateway.fullname" . }}
{{- else }}{{ fail "credentials: set existingSecret to the name of a secret with access_key and secret_key, or set accessKey and secretKey" }}{{ end }}
{{- end }}

{{- define "gateway.port" -}}
{{ dig "server" "port" 8080 .Values.settings | int }}
{{- end }}

{{- define "gateway.metricsPort" -}}
{{ dig "server" "metrics_port" 0 .Values.settings | int }}
{{- end }}

{{- define "gateway.path" -}}
{{ dig "server" "root_path" "" .Values.settings | default "/" }}
{{- end }}

{{/* Annotations that make an ingress hash the path. HAProxy counts path segments, up to the task: /v1/progress/T. */}}
{{- define "gateway.hashByTask" -}}
{{- $uri := printf "uri depth %d" (add 3 (include "gateway.path" . | splitList "/" | compact | len)) -}}
haproxy.org/load-balance: {{ $uri }}
haproxy.org/backend-config-snippet: hash-type consistent
haproxy-ingress.github.io/balance-algorithm: {{ $uri }}
haproxy-ingress.github.io/config-backend: hash-type consistent
nginx.ingress.kubernetes.io/upstream-hash-by: $uri
nginx.org/lb-method: hash $uri consistent
{{- end }}

{{- define "gateway.storeUrl" -}}
{{ dig "store" "url" "" .Values.settings }}
{{- end }}

{{/* server.trusted_hosts as JSON: the setting, or the names that the ingress, the cluster and `kubectl port-forward` use.
     [] allows any name: without an ingress, or with a route for all names. */}}
{{- define "gateway.trustedHosts" -}}
{{- $given := dig "server" "trusted_hosts" list .Values.settings }}
{{- $anyName := and .Values.httpRoute.enabled (not .Values.httpRoute.hostnames) }}
{{- if or $given (not .Values.ingress.enabled) $anyName }}{{ toJson $given }}
{{- else }}
{{- $name := include "gateway.fullname" . }}
{{- $inNamespace := printf "%s.%s" $name .Release.Namespace }}
{{- $inside := list $name $inNamespace (printf "%s.svc" $inNamespace) (printf "%s.svc.cluster.local" $inNamespace) }}
{{- $routed := ternary .Values.httpRoute.hostnames list .Values.httpRoute.enabled }}
{{- concat .Values.ingress.hosts $routed $inside (list "localhost" "127.0.0.1") | uniq | toJson }}
{{- end }}
{{- end }}

{{/* The TOML file. A JSON scalar or list of strings is valid TOML. */}}
{{- define "gateway.toml" -}}
{{- $files := dict "access_key_file" "/run/secrets/sd-gateway/access_key" "secret_key_file" "/run/secrets/sd-gateway/secret_key" }}
{{- if .Values.credentials.next }}
{{- $_ := set $files "next_access_key_file" "/run/secrets/sd-gateway/next_access_key" }}
{{- $_ := set $files "next_secret_key_file" "/run/secrets/sd-gateway/next_secret_key" }}
{{- end }}
{{- $store := dict }}
{{- if .Values.store.existingSecret }}
{{- $named := dict "usernameKey" "username_file" "passwordKey" "password_file" "caKey" "ca_file" }}
{{- $_ := set $named "clientCertKey" "client_cert_file" }}
{{- $_ := set $named "clientKeyKey" "client_key_file" }}
{{- $_ := set $named "sentinelUsernameKey" "sentinel_username_file" }}
{{- $_ := set $named "sentinelPasswordKey" "sentinel_password_file" }}
{{- range $key, $setting := $named }}
{{- with index $.Values.store $key }}{{ $_ := set $store $setting (printf "/run/secrets/sd-gateway-store/%s" .) }}{{ end }}
{{- end }}
{{- end }}
{{- $upstream := dict }}
{{- if .Values.upstream.existingSecret }}
{{- range $key, $setting := dict "caKey" "ca_file" "clientCertKey" "client_cert_file" "clientKeyKey" "client_key_file" }}
{{- with index $.Values.upstream $key }}{{ $_ := set $upstream $setting (printf "/run/secrets/sd-gateway-upstream/%s" .) }}{{ end }}
{{- end }}
{{- end }}
{{- $chart := dict "credentials" $files "store" $store "upstream" $upstream }}
{{- with include "gateway.trustedHosts" . | fromJsonArray }}
{{- $_ := set $chart "server" (dict "trusted_hosts" .) }}
{{- end }}
{{- range $section, $keys := mergeOverwrite (deepCopy .Values.settings) $chart }}
{{- if $keys }}
[{{ $section }}]
{{- range $key, $value := $keys }}
{{ $key }} = {{ toJson $value }}
{{- end }}
{{ end }}
{{- end }}
{{- end }}
